"""The iSCSI target as other people's initiators see it, and as those who mean ill do."""
