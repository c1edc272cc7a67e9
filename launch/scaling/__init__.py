"""Scaling laws: from budgets to runs, from runs to a law, from the law to a forecast that is checked."""
