"""Proofs and measurements of finished checkpoints."""
