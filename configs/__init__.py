"""The networks of the paper. Each config is a short diff of its parent."""
