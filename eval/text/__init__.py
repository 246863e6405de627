"""Text in and out: files of segments, translation, metrics."""
