"""Sources: every kind of data that a user can name, behind one interface."""

from diptych.data.sources.open import Source, find_files, open_finite, open_source, require_pairs

__all__ = ["Source", "find_files", "open_finite", "open_source", "require_pairs"]
