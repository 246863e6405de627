"""What is known of one training: its log, its curves."""
