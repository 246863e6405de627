"""One training and its run: log, curves, settings, figures, report."""
