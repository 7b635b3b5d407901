"""Arithmetic that knows no model."""
