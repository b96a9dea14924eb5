"""What a step is measured by: what ranks report, agreement with the engine, throughput."""
