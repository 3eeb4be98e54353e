"""Figures, contact sheets, the HTML report, and what is printed. They know images and numbers, not models."""
