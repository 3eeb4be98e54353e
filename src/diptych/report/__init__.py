"""Figures, contact sheets and the HTML report. Knows pictures and numbers, not models."""
