"""Who talks to whom: graphs for methods without a centre."""
