<?php
// Length and SHA-1 of the body as PHP saw it.
require __DIR__ . '/_shared.php';

$digest = body_digest();
header('Content-Type: application/json');
echo json_encode(['colour' => getenv('COLOUR'), 'ledger_id' => $_SERVER['HTTP_X_LEDGER_ID'] ?? null] + $digest), "\n";
