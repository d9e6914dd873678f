"""What an allocator is given: the budget, the table of costs, overrides, and what an assignment uses."""
