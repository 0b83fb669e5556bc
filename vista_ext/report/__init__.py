"""What a run shows: tables, pictures, latencies."""
