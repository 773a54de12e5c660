"""What people read: reports, tables, numbers, plots."""
