"""State: snapshots, resets, forks, and live migration."""
