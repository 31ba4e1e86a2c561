"""The review page: where people accept and reject the results of a catalogue."""
