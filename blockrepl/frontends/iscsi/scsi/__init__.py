"""The SCSI device server: a target device with one logical unit per volume. Performs no I/O but through `Volume`."""
