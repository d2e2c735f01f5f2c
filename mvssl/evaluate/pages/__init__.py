"""Pages of what a backbone has learned: nearest neighbours, a map of the features, attention; self-contained HTML."""
