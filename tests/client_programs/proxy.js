// Express with compression() in front of the engine:  proxy.js ENGINE'S URL;  prints its port
'use strict';
const express = require('express');
const compression = require('compression');
const {createProxyMiddleware} = require('http-proxy-middleware');

const app = express();
app.use(compression());
app.use(createProxyMiddleware({target: process.argv[2], logger: undefined}));
const server = app.listen(0, '127.0.0.1', () => console.log(server.address().port));
