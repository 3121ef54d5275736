"""What a person asks of a machine: does it compute right, how fast, what is missing."""
