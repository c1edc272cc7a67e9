"""Collators: what the inputs and the labels of a batch are."""
