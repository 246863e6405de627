"""The experts of a layer: stacked weights (stacked), rows by expert (layouts), experts spread over ranks (ranks)."""
