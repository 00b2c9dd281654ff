"""The HTTP API: OpenAI's completions and chat completions over an engine, and the commands `dsv3 serve` and `dsv3 chat`."""
