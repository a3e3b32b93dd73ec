"""Plans: what the planner sees, what it answers, and when a new plan is worth adopting."""
