"""The live avatar for browsers and programs: HTTP, WebSocket and WebRTC around `Avatar.stream`.

Layer 7: needs the extra `serve`; import what is needed from the modules.
"""
