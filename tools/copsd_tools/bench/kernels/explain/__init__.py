"""What a case must cost, by arithmetic and the code; nothing is measured."""
