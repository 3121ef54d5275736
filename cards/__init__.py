"""What known cards are taken to need for a block and for a picture: modelled, never measured here.

The arithmetic of bytes and operations against stated rates; no device is asked. ``block_seconds``,
``sizes.block_bytes`` and ``known.Card.transfer_seconds`` are for whoever plans: a chooser of levels
by time, a simulation of streaming. ``diagnostics.card`` measures the same on a real card.
"""
