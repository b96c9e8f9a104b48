"""What people are shown: reports, tables, pictures, the live view, and the commands for recorded studies."""
