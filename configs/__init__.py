"""The paper's networks, each a short diff of its parent."""
