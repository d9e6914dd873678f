"""The papers' tables beside ours: what they say, and how their rows are measured on any model."""
