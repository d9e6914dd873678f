"""Roles, and folds that leave what the model computes as it is."""
