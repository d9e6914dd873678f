"""Modules that compute on integers, and the codes that they take."""
