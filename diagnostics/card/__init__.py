"""One script for a card: what the pack computes there and how fast, as a file that can be sent."""
