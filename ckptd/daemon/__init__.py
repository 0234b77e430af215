"""One per node: serves the local trainers and the node's peers."""
