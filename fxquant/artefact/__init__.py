"""Files: the artefact and the cache, written whole, read without running anything in them."""
