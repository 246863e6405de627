"""The experts of a layer: stacked weights, rows by expert (layouts), few rows at inference, experts over ranks."""
