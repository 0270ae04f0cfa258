"""The server below the routes: limits, deadlines, request bodies, WebSockets."""
