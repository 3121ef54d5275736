"""What the nodes' schemas share."""

CATEGORY = "Ideogram 4 Quant"
