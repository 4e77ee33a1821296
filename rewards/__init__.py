"""Rewards: a completion goes in, a Score comes out."""
