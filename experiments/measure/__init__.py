"""Speed, memory and reliability, measured."""
