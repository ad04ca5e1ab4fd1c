"""All that touches ColossalAI. Nothing outside this folder imports it, and inside it only functions do."""
