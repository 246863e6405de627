"""Studies of pairs x methods x seeds: reading a plan, running its cells, collecting and showing the results."""
