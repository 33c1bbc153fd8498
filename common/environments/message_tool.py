"""The tool that takes a message without a tool call, where a protocol has tools alone."""

MESSAGE_TOOL = "send_message"
MESSAGE_ARGUMENT = "text"
"""Its only argument."""
