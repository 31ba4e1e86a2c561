"""Job sheets, pictures and results of a catalogue."""

try:  # inside ComfyUI the pack is one package
    from ..consislora_core.files import escape_text, locked, patiently, write_file, written_whole
except ImportError:  # `python batch` and the tests have the rooms on their path
    from consislora_core.files import escape_text, locked, patiently, write_file, written_whole

__all__ = ["escape_text", "locked", "patiently", "write_file", "written_whole"]
