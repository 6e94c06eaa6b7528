from data.record import record_team  # noqa: F401  until nobody asks for it here
