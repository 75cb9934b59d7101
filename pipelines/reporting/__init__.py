"""What people read: the report, plots, leaderboards, registry entries. Nothing is counted here."""
