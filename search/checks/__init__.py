"""What is checked of a space module before its search is paid for, and the likely causes of what fails."""
