"""What a space module defines: finding and executing it, the parameters it declares, and what is learned of them."""
