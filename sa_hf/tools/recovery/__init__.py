"""How much of dense attention's quality a pattern keeps, and after how many steps: what scripts/recovery.py runs."""
