"""Text from data and language modelling: reading, encoding, decoding and scoring, as pure functions."""
