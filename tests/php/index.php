<?php
// The front controller: says what reached it.
require __DIR__ . '/_shared.php';

$digest = body_digest();
header('Content-Type: application/json');
echo json_encode([
    'colour' => getenv('COLOUR'),
    'pid' => getmypid(),
    'method' => $_SERVER['REQUEST_METHOD'],
    'uri' => $_SERVER['REQUEST_URI'] ?? null,
    'path_info' => $_SERVER['PATH_INFO'] ?? null,
    'query' => $_SERVER['QUERY_STRING'] ?? null,
    'request_id' => $_SERVER['HTTP_X_REQUEST_ID'] ?? null,
    'ledger_id' => $_SERVER['HTTP_X_LEDGER_ID'] ?? null,
    'length' => $digest['length'],
    'sha1' => $digest['sha1'],
    'post' => $_POST,
    'files' => array_map(static fn ($file) => ['name' => $file['name'], 'size' => $file['size'], 'error' => $file['error']], $_FILES),
    'server' => $_SERVER,
], JSON_PARTIAL_OUTPUT_ON_ERROR | JSON_INVALID_UTF8_SUBSTITUTE | JSON_UNESCAPED_SLASHES), "\n";
