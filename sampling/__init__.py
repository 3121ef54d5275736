"""The reference's schedule and guidance, as pure functions."""
